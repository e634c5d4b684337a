"""Cities of the world, each once."""

_NAMES = """
Abidjan Accra Addis_Ababa Adelaide Algiers Almaty Amman Amsterdam Ankara Antananarivo Asmara Athens Auckland Baghdad
Baku Bamako Bandung Bangkok Barcelona Beijing Beirut Belgrade Berlin Bilbao Bogota Boston Brasilia Bratislava Brisbane
Brussels Bucharest Budapest Buenos_Aires Cairo Calgary Cape_Town Caracas Casablanca Chennai Chicago Colombo Copenhagen
Cork Dakar Dallas Damascus Delhi Denver Dhaka Djibouti Doha Dresden Dublin Durban Edinburgh Fukuoka Gaborone Geneva
Glasgow Granada Guadalajara Guayaquil Hamburg Hanoi Harare Havana Helsinki Hobart Honolulu Houston Islamabad Istanbul
Jakarta Jerusalem Johannesburg Kabul Kampala Karachi Kathmandu Khartoum Kigali Kingston Kinshasa Kolkata Krakow Kyoto
Lagos Lahore Lima Lisbon Ljubljana London Luanda Lusaka Lyon Madrid Managua Manila Maputo Marrakesh Medellin Melbourne
Memphis Mexico_City Milan Minsk Mombasa Montevideo Montreal Mumbai Munich Muscat Nairobi Naples Nassau Osaka Oslo
Ottawa Palermo Paris Perth Phoenix Porto Prague Quito Rabat Reykjavik Riga Rome Rosario Santiago Sarajevo Seattle
Seoul Seville Skopje Sofia Stockholm Sydney Tallinn Tashkent
"""

CITIES = tuple(name.replace("_", " ") for name in _NAMES.split())
